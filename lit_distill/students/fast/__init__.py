"""The fast path of a T5: its own mathematics on real tokens only. `lit_distill.students.seq2seq` alone enters it."""
