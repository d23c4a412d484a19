"""Stands in for ms-swift 4.6 where it is not installed: the names and signatures that a tuner is written for."""
