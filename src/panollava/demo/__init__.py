"""The demo profile's world: panoramas of colored objects, questions about them, and two small
towers that have learned to see and to speak on other such panoramas."""
