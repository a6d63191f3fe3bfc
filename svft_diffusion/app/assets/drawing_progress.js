// What is being drawn. Gradio provides element, props and watch; see components/drawing_progress.py.
const root = element.querySelector(".drawing");
const image = document.createElement("img");
const bar = document.createElement("progress");
const text = document.createElement("p");
image.alt = "Preview of the picture that is being drawn";
bar.setAttribute("aria-label", "Steps done");
root.append(image, bar, text);
let seen = false; // a picture of this drawing
let current = null; // the drawing that is shown
let ended = null; // the last one that is over: what was on its way when it was stopped is not shown
let stopping = null; // the one that somebody has stopped and that is not over yet

function show() {
  const value = props.value;
  const drawing = Boolean(value && value.total && value.id !== ended);
  if (drawing) current = value.id;
  else ended = current;
  if (drawing && value.stopping) stopping = value.id;
  const began = drawing && root.hidden;
  if (began) seen = false;
  root.hidden = !drawing;
  if (!drawing) {
    image.removeAttribute("src");
    return;
  }
  const picture = String(value.picture);
  image.hidden = !picture.startsWith("data:image/");
  if (!image.hidden) image.src = picture;
  bar.max = value.total;
  bar.value = value.done;
  text.textContent = value.id === stopping ? "Stopping" : value.text;
  if (began) reveal();
}

function reveal() {
  root.scrollIntoView({ block: "nearest", behavior: "smooth" });
}

image.addEventListener("load", () => {
  if (!seen) reveal();
  seen = true;
});

root.hidden = true;
show();
watch("value", show);
