"""The command line: `lora-hf <verb>`. Only this package prints."""
