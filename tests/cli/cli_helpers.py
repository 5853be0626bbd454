"""Arguments shared by the tests of the command line."""

SHORT = ("--max_train_steps", "2", "--train_batch_size", "2", "--report_to", "none", "--checkpointing_steps", "1")
