// Live parts and copy buttons; every page works without this. Pages come from the server whole: this only puts the
// parts that are marked `data-live` in the places of those before, by their ids.
"use strict";

const page = document;

function showButtons(root) {
  for (const button of root.querySelectorAll("button.copy")) {
    button.hidden = false;
  }
}

page.addEventListener("click", (event) => {
  const button = event.target.closest("button.copy");
  if (button) {
    const text = button.parentElement.querySelector(".copied").textContent;
    navigator.clipboard.writeText(text).then(() => { button.textContent = "Copied"; });
  }
});

let due = new Set();
let busy = false;

function wants(element) {
  const topics = element.dataset.live.split(" ");
  return due.has("everything") || topics.includes("*") || topics.some((topic) => due.has(topic));
}

async function refresh() {
  if (busy || page.hidden || !due.size) return;
  busy = true;
  const places = [...page.querySelectorAll("[data-live]")].filter(wants);
  due = new Set();
  try {
    if (places.length) {
      const answer = await fetch(location.href, { credentials: "same-origin" });
      if (answer.ok) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        for (const place of places) {
          const next = fresh.getElementById(place.id);
          if (next && !place.contains(page.activeElement)) {
            place.replaceWith(page.adoptNode(next));
            showButtons(next);
          }
        }
      }
    }
  } catch {
    // The console is away; the stream connects again.
  } finally {
    busy = false;
    if (due.size) setTimeout(refresh, 250);
  }
}

// A browser has six connections for all pages of a console: those that nobody sees do not keep one.
let stream = null;
let missed = false;

function follow() {
  const badge = page.getElementById("live");
  if (page.hidden) {
    if (stream) stream.close();
    stream = null;
    badge.hidden = missed = true;
    return;
  }
  if (stream) return;
  stream = new EventSource("/live");
  stream.onopen = () => {
    badge.textContent = "live";
    badge.classList.remove("away");
    badge.hidden = false;
    if (missed) {
      missed = false;
      due.add("everything");
      refresh();
    }
  };
  stream.onerror = () => {
    missed = true;
    badge.textContent = "not live";
    badge.classList.add("away");
    badge.hidden = false;
    if (stream && stream.readyState === EventSource.CLOSED) stream = null;  // refused: tried again when it is seen again
  };
  stream.addEventListener("changed", (event) => {
    for (const topic of JSON.parse(event.data)) due.add(topic);
    refresh();
  });
}

showButtons(page);
if (page.querySelector("[data-live]")) {
  follow();
  page.addEventListener("visibilitychange", follow);
  setInterval(() => { due.add("time"); refresh(); }, 10000);
}
