// What Gradio leaves out for those who don't see the page.
const MENDS = {
  // Names without a role that could have one: what is empty, and the lock of a table's column.
  ':is(.empty, .wrapper)[aria-label]:not([role])': { role: 'img' },
  '.image-container > button:not([aria-label])': { 'aria-label': 'Picture' },
  // A button around the one that does the work, under the name of a translation that is missing.
  'button.icon-button:has(button.upload-container):not([role])': {
    role: 'group',
    tabindex: '-1',
    'aria-label': 'More files',
    title: 'More files',
  },
  // A notice is a button around the button that closes it.
  '.toast-header[role=button]': { role: 'group', tabindex: '-1' },
};

function mend() {
  for (const [part, attributes] of Object.entries(MENDS)) {
    for (const found of document.querySelectorAll(part)) {
      for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
    }
  }
}

mend();
new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
