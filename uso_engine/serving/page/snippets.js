// A request as code that makes the same pictures again. Pictures are named as files: they are too long to paste.

const PATH = "/v1/images/generations";
const INDENT = "    ";

/**
 * @typedef {{name: string, type: string} | {url: string}} Named a picture's file, or its URL
 */

/**
 * The request as a shell command.
 * @param {object} request the body, pictures left out
 * @param {(Named|null)[]} pictures content first, null where there is none
 * @param {string} origin of the server
 * @param {boolean} needsKey whether the server wants a key
 * @returns {string}
 */
export function asCurl(request, pictures, origin, needsKey) {
  // The body is a here-document, which the shell expands: `$(base64 …)` is meant to be, everything else is protected from it.
  const items = pictures.map((picture) => {
    if (!picture) return "null";
    if (picture.url) return unexpanded(JSON.stringify(picture.url));
    return `"data:${picture.type};base64,$(base64 < ${shellQuoted(picture.name)} | tr -d '\\n')"`;
  });
  const fields = unexpanded(JSON.stringify(request, null, 2));
  const body = fields.replace(/\n}$/, () => `,\n  "image_urls": [${items.join(", ")}]\n}`);
  const key = needsKey ? ` \\\n  -H "Authorization: Bearer $USO_API_KEY"` : "";
  return `curl ${origin}${PATH}${key} \\\n  -H 'Content-Type: application/json' --data-binary @- <<USO_REQUEST\n${body}\nUSO_REQUEST\n`;
}

/**
 * The request as a Python program with `requests`.
 * @param {object} request the body, pictures left out
 * @param {(Named|null)[]} pictures content first, null where there is none
 * @param {string} origin of the server
 * @param {boolean} needsKey whether the server wants a key
 * @returns {string}
 */
export function asPython(request, pictures, origin, needsKey) {
  const entries = Object.entries(request).map(([name, value]) => `${INDENT}${quoted(name)}: ${pythonValue(value)},`);
  const images = pictures.map((picture) => {
    if (!picture) return "None";
    return picture.url ? quoted(picture.url) : `picture(${quoted(picture.name)}, ${quoted(picture.type)})`;
  });
  const files = pictures.some((picture) => picture && !picture.url);
  return [
    ...(files ? ["import base64"] : []),
    ...(needsKey ? ["import os"] : []),
    ...(files || needsKey ? [""] : []),
    "import requests",
    "",
    ...(files
      ? [
          "",
          "def picture(path: str, media_type: str) -> str:",
          `${INDENT}with open(path, "rb") as file:`,
          `${INDENT.repeat(2)}return f"data:{media_type};base64,{base64.b64encode(file.read()).decode()}"`,
          "",
          "",
        ]
      : []),
    "request = {",
    ...entries,
    `${INDENT}"image_urls": [${images.join(", ")}],`,
    "}",
    needsKey ? `headers = {"Authorization": f"Bearer {os.environ['USO_API_KEY']}"}` : "headers = {}",
    `response = requests.post(${quoted(origin + PATH)}, json=request, headers=headers, timeout=600)`,
    "response.raise_for_status()",
    'for image in response.json()["images"]:',
    `${INDENT}print(image["url"])`,
    "",
  ].join("\n");
}

/** A string as Python and JSON both write it. */
function quoted(text) {
  // Python reads JSON's escapes; half a surrogate pair, which JSON.stringify escapes, it reads as well.
  return JSON.stringify(text);
}

function pythonValue(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, inner]) => `${quoted(name)}: ${pythonValue(inner)}`).join(", ")}}`;
  }
  return typeof value === "string" ? quoted(value) : String(value);
}

function unexpanded(text) {
  return text.replace(/[\\$`]/g, "\\$&");
}

function shellQuoted(text) {
  return `'${text.replace(/'/g, "'\\''")}'`;
}
