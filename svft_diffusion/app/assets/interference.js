// How adapters meet that act together. Gradio provides element, props, trigger and watch.
// The cards are watched for which of them are on; moving a slider changes nothing of that, and asks nothing.
const PAUSE = 400; // milliseconds in which more may change
const root = element.querySelector(".interference");
const said = document.createElement("div");
const lines = document.createElement("ul");
const button = document.createElement("button");
button.type = "button";
button.textContent = "Compare again";
button.title = "How the adapters meet at their weights of now";
button.addEventListener("click", () => trigger("submit"));
said.setAttribute("role", "status");
said.append(lines);
root.append(said, button);
let set = "";
let timer = 0;

function look() {
  const on = [...document.querySelectorAll("#adapter-cards .card:not(.off)")].map((card) => card.dataset.id).sort();
  root.hidden = on.length < 2;
  if (on.join() === set) return;
  set = on.join();
  lines.replaceChildren();
  clearTimeout(timer);
  if (on.length > 1) timer = setTimeout(() => trigger("submit"), PAUSE);
}

function show() {
  const texts = Array.isArray(props.value) ? props.value : [];
  lines.replaceChildren(
    ...texts.map((text) => {
      const item = document.createElement("li");
      item.textContent = text;
      return item;
    }),
  );
}

function begin() {
  const cards = document.querySelector("#adapter-cards");
  if (!cards) return void requestAnimationFrame(begin);
  new MutationObserver(look).observe(cards, { childList: true, subtree: true, attributeFilter: ["class"] });
  look();
}

root.hidden = true;
begin();
show();
watch("value", show);
