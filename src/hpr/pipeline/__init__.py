"""All steps in one: compress, rescore, the record of a run, HierarchicalModel."""
