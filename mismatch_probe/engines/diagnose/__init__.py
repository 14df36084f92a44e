"""The engines' part of a diagnosis: recorded ids under one hypothesis after another."""
