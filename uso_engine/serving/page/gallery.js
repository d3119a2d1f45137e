// Finished pictures: figures with what can be done with each, and the dialog that shows several side by side.

import { make } from "./pictures.js";

/**
 * @typedef {{blob: Blob, seed: number, withheld: boolean, name: string}} Made a finished picture
 */

/** Addresses of blobs that an element shows; given back when it shows others. */
class Addresses {
  #made = [];

  of(blob) {
    const address = URL.createObjectURL(blob);
    this.#made.push(address);
    return address;
  }

  release() {
    for (const address of this.#made.splice(0)) URL.revokeObjectURL(address);
  }
}

/** The pictures of one request. */
export class Gallery {
  #addresses = new Addresses();

  /**
   * @param {HTMLElement} element where figures go
   * @param {Viewer} viewer
   * @param {{useSeed: (seed: number) => void, useAsContent: (made: Made) => void}} actions
   */
  constructor(element, viewer, actions) {
    this.element = element;
    this.viewer = viewer;
    this.actions = actions;
  }

  /** @param {Made[]} images */
  show(images) {
    this.#addresses.release();
    this.images = images;
    this.element.replaceChildren(...images.map((made) => this.#figure(made)));
    this.element.dataset.count = String(images.length);
  }

  #figure(made) {
    const address = this.#addresses.of(made.blob);
    const what = made.withheld ? `Image of seed ${made.seed}, withheld by the safety checker` : `Image of seed ${made.seed}`;
    const enlarge = make("button", { type: "button", className: "picture" }, make("img", { src: address, alt: what }));
    enlarge.setAttribute("aria-label", `Enlarge: ${what}`);
    enlarge.addEventListener("click", () => this.viewer.show(this.images, this.images.indexOf(made)));
    const download = make("a", { href: address, download: made.name, textContent: "Download", className: "button" });
    const again = make("button", { type: "button", textContent: "Use seed" });
    again.addEventListener("click", () => this.actions.useSeed(made.seed));
    const further = make("button", { type: "button", textContent: "Use as content" });
    further.addEventListener("click", () => this.actions.useAsContent(made));
    const notes = made.withheld ? [make("span", { className: "withheld", textContent: "withheld by the safety checker" })] : [];
    const caption = make("figcaption", {}, make("span", { textContent: `seed ${made.seed}` }), ...notes);
    return make("figure", {}, enlarge, caption, make("div", { className: "actions" }, download, again, further));
  }
}

/** A dialog with one picture, or several side by side. */
export class Viewer {
  #addresses = new Addresses();

  /** @param {HTMLDialogElement} dialog */
  constructor(dialog) {
    this.dialog = dialog;
    this.place = dialog.querySelector("#viewer-pictures");
    this.title = dialog.querySelector("#viewer-title");
    dialog.addEventListener("close", () => {
      this.place.replaceChildren();
      this.#addresses.release();
    });
    dialog.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step && this.at !== null) this.show(this.images, (this.at + step + this.images.length) % this.images.length);
    });
  }

  /**
   * @param {Made[]} images
   * @param {number|null} at which of them; null shows all side by side
   */
  show(images, at = null) {
    [this.images, this.at] = [images, at];
    const shown = at === null ? images : [images[at]];
    this.#addresses.release();
    const of = at === null || images.length === 1 ? "" : `, ${at + 1} of ${images.length} (arrow keys)`;
    this.title.textContent = at === null ? `${images.length} pictures side by side` : `seed ${images[at].seed}${of}`;
    this.place.dataset.count = String(shown.length);
    this.place.replaceChildren(
      ...shown.map((made) =>
        make(
          "figure",
          {},
          make("img", { src: this.#addresses.of(made.blob), alt: `Image of seed ${made.seed}` }),
          make("figcaption", { textContent: `seed ${made.seed}` }),
        ),
      ),
    );
    if (!this.dialog.open) this.dialog.showModal();
  }
}

/** The list of earlier requests. */
export class EarlierList {
  #addresses = new Addresses();
  #chosen = new Set();

  /**
   * @param {HTMLElement} section shown where there is something
   * @param {{open: (entry: object) => void, forget: (entry: object) => void, choose: (images: Made[]) => void}} actions
   */
  constructor(section, actions) {
    this.section = section;
    this.list = section.querySelector("ul");
    this.actions = actions;
  }

  /** @param {object[]} entries newest first */
  show(entries) {
    this.#addresses.release();
    this.#chosen.clear();
    this.section.hidden = entries.length === 0;
    this.list.replaceChildren(...entries.map((entry) => this.#item(entry)));
    this.actions.choose([]);
  }

  #item(entry) {
    const images = entry.images.map((made) => make("img", { src: this.#addresses.of(made.blob), alt: "", loading: "lazy" }));
    const prompt = entry.request.prompt || "without a prompt";
    const open = make("button", { type: "button", className: "entry" }, ...images);
    open.setAttribute("aria-label", `Open: ${prompt}, ${new Date(entry.at).toLocaleString()}`);
    open.addEventListener("click", () => this.actions.open(entry));
    const forget = make("button", { type: "button", className: "remove", textContent: "✕" });
    forget.setAttribute("aria-label", `Forget: ${prompt}`);
    forget.addEventListener("click", () => this.actions.forget(entry));
    const mark = make("input", { type: "checkbox" });
    mark.addEventListener("change", () => {
      this.#chosen[mark.checked ? "add" : "delete"](entry);
      this.actions.choose([...this.#chosen].flatMap((one) => one.images));
    });
    const compare = make("label", { className: "check" }, mark, "compare");
    return make("li", {}, open, make("p", { className: "caption", textContent: prompt, title: prompt }), compare, forget);
  }
}
