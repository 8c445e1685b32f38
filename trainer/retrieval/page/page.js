"use strict";

const element = (id) => document.getElementById(id);
let latest = 0; // the number of the search whose answer is to be shown

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never as markup: names are whatever files are called
  return made;
}

function say(text, isError) {
  element("status").textContent = text;
  element("status").className = isError ? "error" : "";
}

function show(source) {
  element("query").src = source;
  element("query").hidden = false;
}

function card(index, hit, wanted) {
  const made = make("button", "card");
  made.type = "button";
  made.title = `${hit.name}: search with this one`;
  const picture = make("img", wanted ? (hit.class === wanted ? "hit" : "miss") : "");
  picture.src = `images/${index}/${hit.row}`;
  picture.alt = hit.class || hit.name;
  made.append(picture, make("span", "", `${hit.rank}. ${hit.class || hit.name}`));
  made.append(make("span", "soft", `distance ${hit.distance.toFixed(3)}`));
  if (hit.class) made.append(make("span", "soft", hit.name.split("/").pop()));
  made.addEventListener("click", () => searchRow(index, hit.row));
  return made;
}

function section(index, found, wanted) {
  const made = make("section");
  const title = make("h2", "", `${found.student} `);
  title.append(make("span", "soft", `${found.images.toLocaleString("en")} images`));
  const hits = make("div", "hits");
  hits.append(...found.hits.map((hit) => card(index, hit, wanted)));
  made.append(title, hits);
  if (found.note) made.append(make("p", "soft", found.note));
  return made;
}

async function search(request) {
  const number = ++latest;
  say("Searching…", false);
  try {
    const answer = await request();
    const said = await answer.json();
    if (number !== latest) return;
    if (!answer.ok) throw new Error(said.error);
    element("results").replaceChildren(...said.results.map((found, index) => section(index, found, said.class)));
    const frames = said.class ? `. Green: ${said.class}, red: another class.` : "";
    say(said.query ? `Nearest to ${said.query}${frames}` : "", false);
  } catch (error) {
    if (number !== latest) return;
    element("results").replaceChildren();
    say(error instanceof TypeError ? "The server does not answer." : error.message, true);
  }
}

function searchFile(file) {
  if (element("query").src.startsWith("blob:")) URL.revokeObjectURL(element("query").src);
  show(URL.createObjectURL(file));
  search(() => fetch("search", { method: "POST", body: file }));
}

function searchRow(index, row) {
  show(`images/${index}/${row}`);
  window.scrollTo({ top: 0 });
  history.replaceState(null, "", `?index=${index}&row=${row}`);
  search(() => fetch(`neighbours/${index}/${row}`));
}

const drop = element("drop");
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files.length) searchFile(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) searchFile(event.clipboardData.files[0]);
});
element("file").addEventListener("change", (event) => {
  if (event.target.files.length) searchFile(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});
element("query").addEventListener("error", () => { element("query").hidden = true; });

fetch("health").then((answer) => answer.json()).then((health) => {
  element("about").textContent =
    health.indexes.map((each) => `${each.student}: ${each.images.toLocaleString("en")} images`).join(" · ");
}).catch(() => say("The server does not answer.", true));

const asked = new URLSearchParams(location.search);
if (asked.has("row")) searchRow(Number(asked.get("index") || 0), Number(asked.get("row")));
