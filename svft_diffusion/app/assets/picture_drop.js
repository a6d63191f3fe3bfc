// A picture dropped anywhere on the Generate tab goes to the field that recalls its settings.
const zone = () => document.querySelector("#recall-picture");
const field = () => zone()?.querySelector("input[type=file]");
const carriesFiles = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
// Fields for other files keep what is dropped on them.
const isOurs = (event) => carriesFiles(event) && zone()?.offsetParent && !event.target.closest?.("[data-testid=file-upload], .upload-container, button:has(input[type=file])");

window.addEventListener("dragover", (event) => {
  if (isOurs(event)) event.preventDefault();
});
window.addEventListener("drop", (event) => {
  const file = event.dataTransfer?.files?.[0];
  if (!file || !isOurs(event) || !field()) return;
  event.preventDefault();
  const files = new DataTransfer();
  files.items.add(file);
  field().files = files.files;
  field().dispatchEvent(new Event("change", { bubbles: true }));
});
