// The form: what the server accepts becomes its bounds, and its values become a request.

const NAMED_SIZES = {
  square_hd: [1024, 1024],
  square: [512, 512],
  portrait_4_3: [768, 1024],
  portrait_16_9: [576, 1024],
  landscape_4_3: [1024, 768],
  landscape_16_9: [1024, 576],
};
const OWN = "own";
const NUMBERS = ["num_inference_steps", "num_images", "seed", "guidance_scale", "true_cfg_scale", "style_scale", "content_long_side"];
const TEXTS = ["prompt", "negative_prompt"];
const SWITCHES = ["keep_size", "enable_safety_checker"];
const GRID = 16;

/** The request's fields, bound by a server's limits. */
export class RequestForm {
  #fields = {};

  /** @param {HTMLFormElement} form */
  constructor(form) {
    this.form = form;
    this.size = form.elements.image_size;
    this.size.addEventListener("change", () => this.#showOwnSize());
    form.elements.num_inference_steps.addEventListener("input", () => this.#showSteps());
    form.addEventListener("input", (event) => event.target.removeAttribute("aria-invalid"));
  }

  /**
   * Take over what the server accepts: bounds, defaults, names of sizes.
   * @param {object} fields JSON schema of each field
   */
  bind(fields) {
    this.#fields = { ...fields };
    for (const name of NUMBERS) this.#fields[name] = numberSchema(fields[name]);
    for (const name of NUMBERS) {
      const input = this.form.elements[name];
      const { minimum, maximum, default: value } = this.#fields[name];
      Object.assign(input, { min: minimum ?? "", max: maximum ?? "" });
      if (input.value === "" || input.type === "range") input.value = value ?? "";
    }
    for (const name of TEXTS) this.form.elements[name].maxLength = fields[name].maxLength;
    for (const name of SWITCHES) {
      const input = this.form.elements[name];
      input.checked = fields[name].default;
      const fixed = "const" in fields[name];
      input.disabled = fixed;
      input.parentElement.title = fixed ? "The operator does not allow switching it off." : "";
    }
    this.form.elements.output_format.replaceChildren(...fields.output_format.enum.map((name) => new Option(name, name)));
    this.#bindSizes(fields.image_size);
    this.#showSteps();
  }

  /**
   * The values as a request, without pictures.
   * @returns {{request: object, problems: {field: string, message: string}[]}}
   */
  read() {
    const problems = [];
    const request = { model: this.#fields.model.const };
    for (const name of TEXTS) request[name] = this.form.elements[name].value;
    request.image_size = this.#readSize(problems);
    for (const name of NUMBERS) {
      const value = this.#number(name, this.#fields[name], problems);
      if (value !== null) request[name] = value;
    }
    for (const name of SWITCHES) request[name] = this.form.elements[name].checked;
    request.output_format = this.form.elements.output_format.value;
    // What is as the server has it anyway need not be said, but for what makes the picture.
    for (const name of ["negative_prompt", "true_cfg_scale", "style_scale", "content_long_side", "keep_size"]) {
      if (request[name] === this.#fields[name].default) delete request[name];
    }
    return { request, problems };
  }

  /**
   * Show a request again.
   * @param {object} request as `read` gave it
   */
  write(request) {
    for (const name of [...NUMBERS, ...TEXTS, "output_format"]) {
      this.form.elements[name].value = request[name] ?? this.#fields[name].default ?? "";
    }
    for (const name of SWITCHES) {
      const input = this.form.elements[name];
      input.checked = input.disabled ? this.#fields[name].default : (request[name] ?? this.#fields[name].default);
    }
    this.#writeSize(request.image_size);
    this.#showSteps();
  }

  /**
   * Point at fields.
   * @param {string[]} names as the server calls them
   */
  mark(names) {
    for (const input of this.form.elements) input.removeAttribute("aria-invalid");
    const inputs = names.map((name) => this.form.elements[name.split(".").pop()]).filter((input) => input instanceof HTMLElement);
    for (const input of inputs) {
      input.setAttribute("aria-invalid", "true");
      const hidden = input.closest("details");
      if (hidden) hidden.open = true;
    }
    if (inputs.length) inputs[0].focus();
  }

  #bindSizes(schema) {
    const choices = schema.anyOf.find((option) => option.enum).enum;
    const own = schema.anyOf.find((option) => option.properties);
    this.mostPixels = own["x-max-pixels"] ?? Infinity;
    for (const side of ["width", "height"]) {
      const { minimum, maximum } = own.properties[side];
      Object.assign(this.form.elements[side], { min: minimum, max: maximum });
    }
    this.size.replaceChildren(
      ...choices.map((name) => new Option(`${name.replaceAll("_", " ")}, ${NAMED_SIZES[name].join("×")}`, name)),
      new Option("own size", OWN),
    );
    this.#writeSize(schema.default);
  }

  #readSize(problems) {
    if (this.size.value !== OWN) return this.size.value;
    const { properties } = this.#fields.image_size.anyOf.find((option) => option.properties);
    const [width, height] = ["width", "height"].map((side) => this.#number(side, properties[side], problems));
    const pixels = [width, height].map((side) => Math.floor((side ?? 0) / GRID) * GRID).reduce((a, b) => a * b);
    if (pixels > this.mostPixels) {
      const most = this.mostPixels.toLocaleString("en");
      problems.push({ field: "width", message: `${width}×${height} is more than ${most} pixels, the most that this server makes` });
    }
    return { width, height };
  }

  #writeSize(size) {
    const named = typeof size === "string";
    this.size.value = named ? size : OWN;
    const [width, height] = named ? NAMED_SIZES[size] : [size.width, size.height];
    Object.assign(this.form.elements.width, { value: width });
    Object.assign(this.form.elements.height, { value: height });
    this.#showOwnSize();
  }

  #showOwnSize() {
    document.getElementById("own-size").hidden = this.size.value !== OWN;
  }

  #showSteps() {
    document.getElementById("steps-shown").textContent = this.form.elements.num_inference_steps.value;
  }

  #number(name, schema, problems) {
    const input = this.form.elements[name];
    if (input.value === "" && !input.validity.badInput) {
      if (!("default" in schema) && name === "seed") return null;  // drawn by the server
      if ("default" in schema) return schema.default;
    }
    const { minimum = -Infinity, maximum = Infinity, type } = schema;
    const value = input.valueAsNumber;
    const whole = [type].flat().includes("integer");
    if (!(value >= minimum && value <= maximum) || (whole && !Number.isInteger(value))) {
      const kind = whole ? "a whole number" : "a number";
      const label = input.labels[0].firstChild.textContent.trim();
      problems.push({ field: name, message: `${label} must be ${kind} from ${minimum} to ${maximum}, got ${input.value || "nothing"}` });
    }
    return value;
  }
}

/** The schema of a number, also where the field may be null instead. */
function numberSchema(schema) {
  const isNumber = (option) => [option.type].flat().some((type) => type === "integer" || type === "number");
  const option = isNumber(schema) ? schema : schema.anyOf.find(isNumber);
  return { ...schema, ...option, type: [option.type].flat().find((type) => type !== "null") };
}
