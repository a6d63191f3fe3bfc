// What the server changes on the adapter cards: carried out at once, on the cards as they are by now.
watch("value", () => trigger("apply"));
