"""The model: an ordinary diffusers folder with a card (diffva.json)."""
