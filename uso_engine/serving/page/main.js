// The page put together: form and pictures in, events of the running request, results, earlier requests.

import { ApiError, generate, readLimits, readState } from "./api.js";
import { RequestForm } from "./form.js";
import { EarlierList, Gallery, Viewer } from "./gallery.js";
import * as kept from "./kept.js";
import { Slot, asUri, make, spread, takeDropsAndPastes } from "./pictures.js";
import { asCurl, asPython } from "./snippets.js";

const $ = (id) => document.getElementById(id);
const KEY = "uso-api-key";
const READY_EVERY_MS = 5000;

const form = new RequestForm($("request"));
const viewer = new Viewer($("viewer"));
const told = { onChange: () => showErrors([]), onError: (message) => showErrors([message]), onMany: takeMany };
const slots = [
  new Slot($("content-slot"), "Content", told),
  new Slot($("style-slot-1"), "Style", told),
  new Slot($("style-slot-2"), "Second style", told),
];
const gallery = new Gallery($("figures"), viewer, {
  useSeed: (seed) => ($("seed").value = seed),
  useAsContent: (made) => slots[0].take(new File([made.blob], made.name, { type: made.blob.type })),
});
const earlier = new EarlierList($("earlier"), { open: showEntry, forget: forgetEntry, choose: chooseForComparison });

let running = null;
let shownEntry = null;
let needsKey = false;
let comparable = [];

function takeMany(slot, items) {
  spread(slots, slot, items);
}

function showErrors(sentences, fields = []) {
  $("errors").replaceChildren(...sentences.map((sentence) => make("p", { textContent: sentence })));
  $("errors").hidden = sentences.length === 0;
  form.mark(fields);
}

/** Pictures as the request has them: content first, null where styles come without content. */
function chosenPictures() {
  const [content, ...styles] = slots.map((slot) => slot.picture);
  const given = styles.filter(Boolean);
  return content || given.length ? [content, ...given] : [];
}

async function run() {
  if (running) return;
  const { request, problems } = form.read();
  if (problems.length) {
    showErrors(problems.map((problem) => problem.message), problems.map((problem) => problem.field));
    return;
  }
  showErrors([]);
  running = new AbortController();
  const inputs = chosenPictures();
  showRunning(true);
  try {
    const uris = await Promise.all(inputs.map((picture) => picture && asUri(picture)));
    for await (const event of generate({ ...request, image_urls: uris }, $("key").value, running.signal)) {
      if (event.name === "done") await finish(request, inputs, event.data);
      else showProgress(event);
    }
  } catch (error) {
    if (!(error instanceof ApiError)) {
      if (!running.signal.aborted) throw error;
      showErrors(["Cancelled."]);
    } else {
      showApiError(error);
    }
  } finally {
    running = null;
    showRunning(false);
  }
}

function showApiError(error) {
  const sentences = error.errors.length ? error.errors : [error.message];
  if (error.status === 401) sentences.push("Type a valid API key at the top of the page.");
  if (error.retryAfter) sentences.push(`Try again in ${error.retryAfter} s.`);
  if (error.requestId) sentences.push(`Request ${error.requestId}.`);
  showErrors(sentences, error.fields);
  if (error.status === 401) $("key").focus();
}

function showRunning(runs) {
  $("generate").disabled = runs;
  $("cancel").hidden = !runs;
  $("show-code").hidden = runs;
  $("progress").hidden = !runs;
  $("empty").hidden = runs || shownEntry !== null;
  $("result").hidden = runs || shownEntry === null;
  document.body.classList.toggle("running", runs);
  if (!runs) return;
  $("state").textContent = "Sending";
  $("bar").removeAttribute("value");
  $("preview").hidden = true;
  $("stage").scrollTop = 0;
  if ($("stage").getBoundingClientRect().top > innerHeight * 0.8) $("stage").scrollIntoView({ block: "start" });
}

function showProgress({ name, data }) {
  const words = {
    queued: () => (data.position ? `Waiting, ${data.position} before this one` : "Waiting"),
    conditioning: () => "Reading prompt and pictures",
    step: () => `Step ${data.index + 1} of ${data.steps}`,
    decoding: () => "Decoding",
  };
  if (!(name in words)) return;
  $("state").textContent = words[name]();
  if (name !== "step") return;
  Object.assign($("bar"), { max: data.steps, value: data.index + 1 });
  if (data.preview) Object.assign($("preview"), { src: data.preview, hidden: false });
}

async function finish(request, inputs, answer) {
  const images = await Promise.all(answer.images.map((image, at) => made(image, at, answer)));
  const entry = { at: Date.now(), request: { ...request, seed: answer.seed }, inputs, images };
  try {
    entry.id = await kept.keep(entry);
  } catch (error) {
    showErrors([`This browser does not keep the picture: ${error.message || error.name}.`]);
  }
  showEntry(entry);
  await refreshEarlier();
}

async function made(image, at, answer) {
  const blob = await (await fetch(image.url)).blob();
  // After the last seed comes the first.
  const seed = ((answer.seed - 1 + at) % Number.MAX_SAFE_INTEGER) + 1;
  const ending = blob.type === "image/jpeg" ? "jpg" : "png";
  return { blob, seed, withheld: answer.has_nsfw_concepts[at], name: `uso-${seed}.${ending}` };
}

function showEntry(entry) {
  shownEntry = entry;
  $("empty").hidden = true;
  $("result").hidden = Boolean(running);
  gallery.show(entry.images);
  showMadeFrom(entry);
  chooseForComparison([]);
}

let madeFromAddresses = [];
function showMadeFrom({ request, inputs }) {
  madeFromAddresses.forEach((address) => URL.revokeObjectURL(address));
  madeFromAddresses = [];
  const pictures = inputs.filter(Boolean).map((picture) => {
    const address = picture.blob ? URL.createObjectURL(picture.blob) : picture.url;
    if (picture.blob) madeFromAddresses.push(address);
    return make("img", { src: address, alt: `Made from ${picture.name}`, title: picture.name });
  });
  const size = typeof request.image_size === "string" ? request.image_size.replaceAll("_", " ") : `${request.image_size.width}×${request.image_size.height}`;
  const facts = `${request.num_inference_steps} steps, guidance ${request.guidance_scale}, ${request.keep_size ? "shape of the content" : size}`;
  const text = make("div", {}, make("p", { textContent: request.prompt || "without a prompt" }), make("p", { className: "quiet", textContent: facts }));
  $("made-from").replaceChildren(...pictures, text);
}

/** @param {object[]} chosen of earlier requests; none compares the shown one's pictures */
function chooseForComparison(chosen) {
  const own = shownEntry ? shownEntry.images : [];
  comparable = chosen.length ? [...new Set([...own, ...chosen])] : own;
  const unique = new Map(comparable.map((image) => [`${image.seed} ${image.blob.size}`, image]));
  comparable = [...unique.values()];
  $("compare").hidden = comparable.length < 2;
  $("compare").textContent = `Compare ${comparable.length} side by side`;
}

async function forgetEntry(entry) {
  await kept.forget(entry.id);
  await refreshEarlier();
}

async function refreshEarlier() {
  try {
    earlier.show(await kept.entries());
  } catch {
    earlier.show([]);  // a browser that keeps nothing, such as a private window
  }
}

let language = "curl";
let coded = null;
function showCode(request, pictures) {
  coded = { request, pictures: pictures.map((picture) => picture && (picture.url ? { url: picture.url } : { name: picture.name, type: picture.blob.type })) };
  drawCode();
  $("code").showModal();
}

function drawCode() {
  const write = language === "curl" ? asCurl : asPython;
  $("code-text").textContent = write(coded.request, coded.pictures, location.origin, needsKey);
  $("copied").textContent = "";
  for (const name of ["curl", "python"]) {
    $(`tab-${name}`).setAttribute("aria-selected", String(name === language));
    $(`tab-${name}`).tabIndex = name === language ? 0 : -1;
  }
  $("code-text").setAttribute("aria-labelledby", `tab-${language}`);
}

async function copyCode() {
  const text = $("code-text").textContent;
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = "Copied.";
  } catch {  // only pages of https and of this machine may write to the clipboard
    getSelection().selectAllChildren($("code-text"));
    $("copied").textContent = "Selected: copy it with the keyboard.";
  }
}

function connectEvents() {
  $("request").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("cancel").addEventListener("click", () => running && running.abort());
  $("compare").addEventListener("click", () => viewer.show(comparable));
  $("show-code").addEventListener("click", () => showCode(form.read().request, chosenPictures()));
  $("show-result-code").addEventListener("click", () => showCode(shownEntry.request, shownEntry.inputs));
  $("use-request").addEventListener("click", useRequest);
  $("copy-code").addEventListener("click", copyCode);
  $("forget-all").addEventListener("click", async () => {
    if (!confirm("Forget all earlier pictures of this browser?")) return;
    await kept.forgetAll();
    await refreshEarlier();
  });
  for (const name of ["curl", "python"]) {
    $(`tab-${name}`).addEventListener("click", () => ((language = name), drawCode()));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      language = name === "curl" ? "python" : "curl";
      drawCode();
      $(`tab-${language}`).focus();
    });
  }
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
  $("key-form").addEventListener("submit", (event) => event.preventDefault());
  $("key").addEventListener("change", () => sessionStorage.setItem(KEY, $("key").value));
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
  });
  takeDropsAndPastes(slots);
}

function useRequest() {
  form.write(shownEntry.request);
  const { inputs } = shownEntry;
  slots.forEach((slot, at) => slot.set(inputs[at] ?? null));
  $("prompt").focus();
}

async function watchServer() {
  const words = { ready: "ready", loading: "loading the model", unreachable: "cannot be reached" };
  for (;;) {
    const state = document.hidden ? null : await readState();
    if (state) {
      $("server").textContent = words[state];
      $("server").dataset.state = state;
    }
    await new Promise((resolve) => setTimeout(resolve, READY_EVERY_MS));
  }
}

async function start() {
  connectEvents();
  watchServer();
  $("key").value = sessionStorage.getItem(KEY) || "";
  await refreshEarlier();
  try {
    const limits = await readLimits();
    form.bind(limits.fields);
    needsKey = limits.needsKey;
    $("key-form").hidden = !needsKey;
    $("model").textContent = limits.fields.model.const;
  } catch (error) {
    $("generate").disabled = true;
    showErrors([`What this server accepts cannot be read: ${error.message}. Reload the page.`]);
  }
  document.body.dataset.started = "yes";
}

start();
