// Earlier requests of this browser with their pictures, in IndexedDB. Nothing of it leaves the device.

const NAME = "uso-engine";
const STORE = "entries";
const MOST = 60;

/**
 * @typedef {{id?: number, at: number, request: object, inputs: (object|null)[], images: {blob: Blob, seed: number, withheld: boolean,
 *   name: string}[]}} Entry
 */

function opened() {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

async function transact(mode, work) {
  const database = await opened();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const asked = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(asked && asked.result);
      transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

/** @returns {Promise<Entry[]>} newest first */
export async function entries() {
  return (await transact("readonly", (store) => store.getAll())).reverse();
}

/**
 * Keep an entry; the oldest go where there are too many.
 * @param {Entry} entry
 * @returns {Promise<number>} its id
 */
export async function keep(entry) {
  const id = await transact("readwrite", (store) => store.add(entry));
  const keys = await transact("readonly", (store) => store.getAllKeys());
  const surplus = keys.slice(0, Math.max(0, keys.length - MOST));
  if (surplus.length) await transact("readwrite", (store) => store.delete(IDBKeyRange.upperBound(surplus.at(-1))));
  return id;
}

/** @param {number} id */
export async function forget(id) {
  await transact("readwrite", (store) => store.delete(id));
}

/** Forget everything. */
export async function forgetAll() {
  await transact("readwrite", (store) => store.clear());
}
