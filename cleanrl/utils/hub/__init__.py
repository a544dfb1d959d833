"""The Hugging Face Hub: `download` fetches a file, `publish` uploads a run, `card` writes its model card."""
