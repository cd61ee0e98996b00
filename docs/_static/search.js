// Search as you type: below every search field stands what pagefind's index has (docs/build.py makes it; no request leaves the site).
const root = new URL(document.documentElement.dataset.content_root ?? "./", location.href);
let index;  // loaded with the first letter that is typed
const loaded = () => index ??= import(new URL("pagefind/pagefind.js", root)).then(async (pagefind) => {
  await pagefind.options({ excerptLength: 24, ranking: { pageLength: 0.2 } });  // a long chapter is no worse an answer than a short one
  return pagefind;
});

// every page has to have every word that is looked up: words of a question that say nothing are left out
const asked = (words) => words.replace(/\b(how|what|why|when|which|where|do|does|did|can|is|are|i|you|my|your|a|an|the|to|of|in|it)\b/gi, " ").trim() || words;

function link(url, title) {
  const a = document.createElement("a");
  a.href = url;
  a.textContent = title;
  return a;
}

function excerpt(html) {
  const p = document.createElement("p");
  p.innerHTML = html;  // of our own pages, with the words marked
  return p;
}

function entry(page) {
  const item = document.createElement("li");
  const parts = page.sub_results.filter((part) => part.url !== page.url).slice(0, 3);
  item.append(link(page.url, page.meta.title), excerpt((parts[0] ?? page).excerpt));
  if (parts.length) {
    const list = document.createElement("ul");
    for (const part of parts) {
      const line = document.createElement("li");
      line.append(link(part.url, part.title));
      list.append(line);
    }
    item.append(list);
  }
  return item;
}

for (const form of document.querySelectorAll("form.bd-search")) {
  const field = form.querySelector("input[type=search]");
  const said = document.createElement("p"), found = document.createElement("ol");
  said.setAttribute("role", "status");
  found.className = "found";
  const box = document.createElement("div");
  box.className = "search-found";
  box.append(said, found);
  form.after(box);
  const look = async () => {
    const words = field.value.trim();
    if (!words) return said.textContent = "", found.replaceChildren();
    let pagefind;
    try { pagefind = await loaded(); }
    catch { return said.textContent = "The search needs a server: python -m http.server in the site's folder."; }
    const search = await pagefind.debouncedSearch(asked(words), {}, 120);
    if (!search) return;  // more was typed meanwhile
    const pages = await Promise.all(search.results.slice(0, 12).map((result) => result.data()));
    if (words !== field.value.trim()) return;
    found.replaceChildren(...pages.map(entry));
    said.textContent = search.results.length ? `${search.results.length} pages found` : "No page has these words.";
  };
  field.addEventListener("input", look);
  if (form.closest("main")) {
    form.addEventListener("submit", (event) => (event.preventDefault(), look()));
    field.value = new URLSearchParams(location.search).get("q") ?? "";
    look();
  }
}
