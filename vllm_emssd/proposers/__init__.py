"""Where drafts come from: a proposer takes a `DraftBatch` and returns ragged drafts."""
