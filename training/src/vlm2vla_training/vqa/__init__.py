"""What a fine-tune leaves of a model's visual question answering (section 4.1, Table 1, appendix C)."""
