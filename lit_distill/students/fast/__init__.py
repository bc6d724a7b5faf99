"""The fast path: the student's own mathematics on real tokens only. Entered from `lit_distill.modules` alone."""
