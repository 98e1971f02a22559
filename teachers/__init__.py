"""Dense models that say what comes next: scoring windows of tokens, and reducing logits to what is stored."""
