// What a picture tells. Gradio provides element, props and watch. All of it is shown as text, never as markup.
const root = element.querySelector(".details");

function make(tag, parent, text) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function show() {
  root.replaceChildren();
  const value = props.value;
  if (!value) {
    make("p", root, "Choose a picture to see how it was made.");
    return;
  }
  if (value.notes.length) {
    const said = make("div", root);
    said.setAttribute("role", "status");
    const notes = make("ul", said);
    for (const note of value.notes) make("li", notes, note);
  }
  const list = make("dl", root);
  for (const [name, text] of value.details) {
    const line = make("div", list);
    make("dt", line, name);
    const shown = make("dd", line, text);
    if (shown.scrollHeight > shown.clientHeight) shown.tabIndex = 0; // long ones scroll, by keys too
  }
}

show();
watch("value", show);
