// The conversation in the page. props.value comes from transcript.py: {turns: [{question, answers}], busy, words, language}.
// Only what has changed is put in, so that a picture does not flicker, a selection stays and the keyboard's place is kept.
const log = element.querySelector(".turns");
const empty = element.querySelector(".empty");
let following = true; // the end is kept in sight until a person scrolls up, and again from the next question on

let lastTop = 0;

// Only a way up is a person's: what is said makes the conversation longer, it does not move it.
function notice() {
  if (log.scrollTop < lastTop - 2) following = false;
  else if (log.scrollHeight - log.scrollTop - log.clientHeight < 60) following = true;
  lastTop = log.scrollTop;
}

function follow() {
  if (following) log.scrollTop = log.scrollHeight;
  lastTop = log.scrollTop;
}

log.addEventListener("scroll", notice);
log.addEventListener("load", () => { notice(); follow(); }, true); // a picture that has come makes the conversation longer
new ResizeObserver(() => { notice(); follow(); }).observe(log);

function put(node, html) {
  if (node.html === html || node.querySelector("textarea")) return; // what a person edits is not taken away
  node.html = html;
  node.innerHTML = html;
}

function child(parent, number, name, className) {
  while (parent.children.length <= number) {
    const node = document.createElement(name);
    node.className = className;
    parent.append(node);
  }
  return parent.children[number];
}

function trim(parent, length) {
  while (parent.children.length > length) parent.lastChild.remove();
}

function show() {
  const { turns, busy, words, language } = props.value;
  notice(); // a person may have scrolled since the last event
  if (busy && log.getAttribute("aria-busy") !== "true") following = true;
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  log.setAttribute("aria-label", words.conversation);
  log.setAttribute("aria-busy", busy);
  empty.textContent = words.empty;
  empty.hidden = turns.length > 0;
  trim(log, turns.length);
  turns.forEach((turn, number) => {
    const article = child(log, number, "article", "turn");
    put(child(article, 0, "section", "question"), turn.question);
    const answers = child(article, 1, "div", "answers");
    trim(answers, turn.answers.length);
    turn.answers.forEach((html, column) => put(child(answers, column, "section", "answer"), html));
  });
  follow();
}

async function copy(button, text) {
  await navigator.clipboard.writeText(text);
  const label = button.getAttribute("aria-label");
  button.setAttribute("aria-label", props.value.words.copied);
  button.classList.add("done");
  setTimeout(() => { button.setAttribute("aria-label", label); button.classList.remove("done"); }, 1500);
}

// A text becomes a field in its place. Enter sends, Shift-Enter is a new line, Escape leaves it as it was.
function edit(section, said, event, data) {
  const { words } = props.value;
  const form = document.createElement("form");
  form.className = "edit";
  const field = Object.assign(document.createElement("textarea"), { value: said.dataset.text, rows: 3 });
  field.setAttribute("aria-label", data.action === "edit" ? words.edit : words.correct);
  const send = Object.assign(document.createElement("button"), { textContent: data.action === "edit" ? words.send : words.keep });
  const cancel = Object.assign(document.createElement("button"), { textContent: words.cancel, type: "button" });
  form.append(field, send, cancel);
  const close = () => {
    form.remove();
    section.classList.remove("editing");
    section.querySelector(`[data-action=${data.action}]`)?.focus();
    show();
  };
  cancel.onclick = close;
  form.onsubmit = (sent) => {
    sent.preventDefault();
    const text = field.value;
    close();
    trigger(event, { ...data, text });
  };
  field.onkeydown = (key) => {
    if (key.key === "Escape") close();
    if (key.key === "Enter" && !key.shiftKey && !key.isComposing) { key.preventDefault(); form.requestSubmit(); }
    key.stopPropagation();
  };
  section.classList.add("editing");
  said.after(form);
  field.focus();
}

log.addEventListener("click", (click) => {
  const button = click.target.closest("[data-action]");
  if (!button) return;
  const section = button.closest("section");
  const said = section.querySelector(".said");
  const data = { action: button.dataset.action, turn: +button.dataset.turn, column: +button.dataset.column };
  if (data.action === "copy") copy(button, said.dataset.text);
  else if (data.action === "edit" || data.action === "correct") edit(section, said, data.action === "edit" ? "edit" : "input", data);
  else trigger(data.action, data);
});

// Gradio names its own buttons in the browser's language; the page has a switch.
function name(selector, word) {
  for (const node of document.querySelectorAll(selector)) {
    if (node.getAttribute("aria-label") !== word) node.setAttribute("aria-label", word);
  }
}

function nameAll() {
  const { words } = props.value;
  name("#box textarea", words.box);
  name("#box .full-container", words.box);
  name("#box .upload-button", words.upload);
  name("#box .submit-button", words.submit);
  name("#box .stop-button", words.stop);
  name("#theme", words.theme);
  name("#settings .toggle-button", words.settings);
}

new MutationObserver(nameAll).observe(document.body, { childList: true, subtree: true });
watch("value", () => { show(); nameAll(); });
show();
nameAll();
