"""The pipeline joins the steps: compress, the steps on data of any kind, re-scoring, the record of a run, reuse by rule."""
