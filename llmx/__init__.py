"""llmx turns a Hugging Face checkpoint into an artifact that runs where people deploy, and proves it there."""
