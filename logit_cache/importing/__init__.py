"""Other people's files of targets → a cache, or an entry of one: `logit-cache import`. `formats/` has one file for each
format; what is written is the same for all. No teacher runs here, and no pickle is ever read."""
