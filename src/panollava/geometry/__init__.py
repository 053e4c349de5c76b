"""Rays, views of a panorama, and the overlap of neighboring views."""
