"""The demo profile: rendered panoramas of colored objects, questions about them, and two small
towers pretrained on other such panoramas."""
