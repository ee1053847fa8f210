"""What happens around an optimizer step, one file each."""
