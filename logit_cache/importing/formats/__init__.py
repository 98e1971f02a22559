"""One file for each format of other people: its documents, and what is peculiar to it. What holds of all formats
(alignment, sums, ids outside the vocabulary, the order of a row) belongs in the folder above."""
