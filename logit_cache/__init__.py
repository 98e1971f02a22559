"""The application: text → token stream → teacher entries, and the commands and reports around them."""
