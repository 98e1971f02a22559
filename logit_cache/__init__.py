"""The application: text → token stream → teacher entries, and what a user sees of them."""
