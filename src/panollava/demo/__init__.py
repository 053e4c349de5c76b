"""The demo profile's world: panoramas of coloured objects, questions about them, and two small
towers that have learned to see and to speak on other such panoramas."""
