"""Pictures to train on: people's photos, class images, and the order and cut in which training sees them."""
