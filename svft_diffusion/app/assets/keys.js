// Keys of the Generate tab: Ctrl+Enter draws, Esc stops. Both press the buttons that everybody can press.
const isThere = (button) => button && !button.disabled && button.offsetParent !== null;

function onKey(event) {
  if (event.defaultPrevented || event.isComposing) return;
  const withControl = event.ctrlKey || event.metaKey;
  const id = event.key === "Enter" && withControl ? "generate" : event.key === "Escape" ? "stop" : null;
  const button = id && document.querySelector(`button#${id}, #${id} button`);
  if (!isThere(button)) return;
  // An open list of a field, or a dialog, has Esc for itself.
  if (id === "stop" && document.querySelector("[role=dialog], ul.options, [aria-expanded=true]")) return;
  event.preventDefault();
  // A number that is still being typed counts when its field is left.
  if (id === "generate" && document.activeElement?.matches("input")) document.activeElement.dispatchEvent(new Event("change", { bubbles: true }));
  button.click();
}

window.addEventListener("keydown", onKey);
