// The list of the library. All text comes from files of others: it goes into the page by textContent alone.
const list = element.querySelector('.library-list');

function add(parent, tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  parent.append(made);
  return made;
}

function addButton(parent, text, label, event, data) {
  const button = add(parent, 'button', text);
  button.type = 'button';
  button.setAttribute('aria-label', label);
  button.addEventListener('click', () => trigger(event, data));
  return button;
}

function addPicture(parent, thumbnail) {
  if (!thumbnail.startsWith('data:image/jpeg;base64,')) return add(parent, 'div', '', 'no-picture');
  const picture = add(parent, 'img');
  picture.alt = '';
  picture.loading = 'lazy';
  picture.src = thumbnail;
  return picture;
}

function addCard(parent, card, chosen) {
  const item = add(parent, 'li', undefined, card.id === chosen ? 'card chosen' : 'card');
  addPicture(item, card.thumbnail);
  const said = add(item, 'div', undefined, 'said');
  add(said, 'h2', card.title);
  if (card.name !== card.title) add(said, 'p', card.name, 'name');
  const facts = add(said, 'dl');
  for (const [name, value] of card.facts) {
    add(facts, 'dt', name);
    add(facts, 'dd', value);
  }
  add(said, 'p', card.fit, `fit ${card.state}`);
  const buttons = add(said, 'div', undefined, 'buttons');
  if (card.addable) addButton(buttons, 'Add to Generate', `Add ${card.name} to Generate`, 'add_card', {id: card.id});
  const details = addButton(buttons, 'Details', `Details of ${card.name}`, 'show_details', {id: card.id});
  details.setAttribute('aria-pressed', String(card.id === chosen));
}

function draw() {
  const value = props.value || {cards: [], damaged: [], note: '', more: 0};
  const focused = list.contains(document.activeElement) ? document.activeElement.getAttribute('aria-label') : null;
  list.replaceChildren();
  if (value.note) add(list, 'p', value.note, 'note').setAttribute('role', 'status');
  const cards = add(list, 'ul', undefined, 'cards');
  for (const card of value.cards) addCard(cards, card, value.chosen);
  if (value.more) addButton(list, `Show ${value.more} more`, `Show ${value.more} more adapters`, 'show_more', {});
  if (value.damaged.length) {
    add(list, 'h2', 'Can\u2019t be used');
    const damaged = add(list, 'ul', undefined, 'damaged');
    for (const file of value.damaged) add(damaged, 'li', `${file.name}: ${file.reason}`);
  }
  if (focused) [...list.querySelectorAll('button')].find((one) => one.getAttribute('aria-label') === focused)?.focus();
}

draw();
watch('value', draw);

// The list is read again whenever its tab opens: trainings and other visitors add adapters. The margin counts what
// the visitor has scrolled away as still in view.
let seen = false;
new IntersectionObserver((entries) => {
  const visible = entries[entries.length - 1].isIntersecting;
  if (visible && !seen) trigger('come_into_view', {});
  seen = visible;
}, { rootMargin: '1000000px' }).observe(element);
