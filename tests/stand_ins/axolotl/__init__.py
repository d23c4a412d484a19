"""Stands in for axolotl 0.19 where it is not installed: the names and signatures that a plugin is written for."""
