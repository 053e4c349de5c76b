"""Directions on the sphere, views of a panorama, and what views share."""
