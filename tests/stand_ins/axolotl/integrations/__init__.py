"""Stands in for axolotl.integrations."""
