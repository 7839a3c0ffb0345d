"""What is the same in every SGLang version that is supported."""
