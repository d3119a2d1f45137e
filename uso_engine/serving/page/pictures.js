// The three places for input pictures: dropped, pasted or chosen, shown as they will be sent.

const SENT_AS_IS = ["image/png", "image/jpeg", "image/webp"];
const MOST_BYTES = 50 * 2 ** 20;

/**
 * @typedef {{blob?: Blob, url?: string, name: string, width?: number, height?: number}} Picture a file's bytes or a URL
 */

/** A place for one picture. */
export class Slot {
  #picture = null;
  #shown = "";

  /**
   * @param {HTMLElement} element an empty element
   * @param {string} label what the place is for
   * @param {{onChange: () => void, onError: (message: string) => void, onMany: (slot: Slot, items: (File|string)[]) => void}} told
   */
  constructor(element, label, told) {
    this.label = label;
    this.told = told;
    this.element = element;
    this.input = make("input", { type: "file", accept: "image/*", multiple: true, id: `${element.id}-file` });
    this.face = make("label", { className: "face", htmlFor: this.input.id });
    this.remove = make("button", { type: "button", className: "remove", textContent: "✕", hidden: true });
    this.remove.setAttribute("aria-label", `Remove ${label}`);
    this.caption = make("p", { className: "quiet caption" });
    element.append(this.input, this.face, this.remove, this.caption);
    this.input.addEventListener("change", () => {
      told.onMany(this, [...this.input.files]);
      this.input.value = "";  // so that the same file can be chosen again
    });
    this.remove.addEventListener("click", () => {
      this.set(null);
      this.input.focus();
    });
    this.#draw();
  }

  /** @returns {Picture|null} */
  get picture() {
    return this.#picture;
  }

  /** @param {Picture|null} picture replaces what was there */
  set(picture) {
    this.#picture = picture;
    this.#draw();
    this.told.onChange();
  }

  /** @param {File|string} item a file or a URL */
  async take(item) {
    try {
      this.set(await pictureOf(item));
    } catch (error) {
      this.told.onError(error.message);
    }
  }

  #draw() {
    URL.revokeObjectURL(this.#shown);
    const picture = this.#picture;
    this.#shown = picture && picture.blob ? URL.createObjectURL(picture.blob) : "";
    this.element.classList.toggle("filled", Boolean(picture));
    this.remove.hidden = !picture;
    if (!picture) {
      this.face.replaceChildren(make("span", { className: "plus", textContent: "+" }), this.label);
      this.caption.textContent = "";
      return;
    }
    const source = this.#shown || picture.url;
    const image = make("img", { src: source, alt: `${this.label}: ${picture.name}` });
    image.addEventListener("error", () => image.replaceWith(make("span", { className: "name", textContent: picture.name })));
    this.face.replaceChildren(image);
    const size = picture.width ? `${picture.width}×${picture.height}, ${bytes(picture.blob.size)}` : "fetched by the server";
    this.caption.textContent = `${this.label}: ${picture.name}, ${size}`;
  }
}

/**
 * Take pictures that are dropped anywhere on the page or pasted into it.
 * @param {Slot[]} slots the first empty one takes a picture; the last one where all are full
 */
export function takeDropsAndPastes(slots) {
  const closest = (target) => slots.find((slot) => slot.element.contains(target));
  addEventListener("dragover", (event) => {
    if (![...event.dataTransfer.types].some((type) => type === "Files" || type === "text/uri-list")) return;
    event.preventDefault();
    document.body.classList.add("dragging");
    for (const slot of slots) slot.element.classList.toggle("aimed", slot === closest(event.target));
  });
  const calm = () => {
    document.body.classList.remove("dragging");
    for (const slot of slots) slot.element.classList.remove("aimed");
  };
  addEventListener("dragleave", (event) => event.relatedTarget || calm());
  addEventListener("drop", (event) => {
    calm();
    const items = itemsOf(event.dataTransfer);
    if (!items.length) return;
    event.preventDefault();
    spread(slots, closest(event.target), items);
  });
  addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    if (!files.length) return;  // text goes where the cursor is
    event.preventDefault();
    spread(slots, closest(document.activeElement), files);
  });
}

/**
 * Give pictures to the aimed place and, one each, to the empty ones after it.
 * @param {Slot[]} slots all
 * @param {Slot|undefined} aimed where they were dropped
 * @param {(File|string)[]} items
 */
export function spread(slots, aimed, items) {
  const others = slots.filter((slot) => slot !== aimed && !slot.picture);
  const places = aimed ? [aimed, ...others] : others.length ? others : [slots[slots.length - 1]];
  items.slice(0, places.length).forEach((item, at) => places[at].take(item));
  if (items.length > places.length) places[0].told.onError(`There is room for ${places.length} more; the rest was left out.`);
}

/**
 * A picture as a request carries it.
 * @param {Picture} picture
 * @returns {Promise<string>} a data URI, or the URL
 */
export async function asUri(picture) {
  if (picture.url) return picture.url;
  const reader = new FileReader();
  const read = new Promise((resolve, reject) => {
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
  });
  reader.readAsDataURL(picture.blob);
  return read;
}

function itemsOf(transfer) {
  const files = [...transfer.files];
  if (files.length) return files;
  const list = transfer.getData("text/uri-list").split(/\r?\n/);
  return list.filter((line) => /^https?:\/\//i.test(line));
}

async function pictureOf(item) {
  if (typeof item === "string") return { url: item, name: item.replace(/[?#].*$/, "") };
  let bitmap;
  try {
    bitmap = await createImageBitmap(item);
  } catch {
    throw new Error(`${item.name} is no picture that this browser can read.`);
  }
  const { width, height } = bitmap;
  let [blob, name] = [item, item.name];
  if (!SENT_AS_IS.includes(item.type)) {  // the server takes three formats; the browser reads more
    blob = await asPng(bitmap);
    name = `${item.name.replace(/\.[^.]*$/, "")}.png`;
  }
  bitmap.close();
  if (blob.size > MOST_BYTES) throw new Error(`${name} has ${bytes(blob.size)}; at most ${bytes(MOST_BYTES)} are accepted.`);
  return { blob, name, width, height };
}

async function asPng(bitmap) {
  const canvas = make("canvas", { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function bytes(count) {
  return count < 1e6 ? `${Math.max(1, Math.round(count / 1e3))} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

/**
 * An element with properties.
 * @param {string} tag
 * @param {object} properties
 * @param {(Node|string)[]} children
 */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
