"""Puts this folder on the import path: helpers shared by unit and integration tests live here."""
