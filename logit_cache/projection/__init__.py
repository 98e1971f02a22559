"""`logit-cache project`: an entry in the vocabulary of another tokenizer, without its teacher. No losses: those are
`student.loss`'s; and no tokenizing of text, which is `logit_cache.corpus`'s."""
