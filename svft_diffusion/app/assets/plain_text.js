// Lines of text from files of others, as they are: they go into the page by textContent alone.
const text = element.querySelector('pre');
const show = () => {
  text.textContent = (props.value || []).join('\n');
};
show();
watch('value', show);
