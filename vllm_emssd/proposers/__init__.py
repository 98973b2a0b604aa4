"""Where drafts come from. Each proposer sees a `DraftBatch` and returns ragged drafts."""
