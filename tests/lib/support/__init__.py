"""What several tests share: cases, oracles, small models, and programs that tests start."""
