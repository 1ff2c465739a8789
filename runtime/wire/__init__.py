"""furiosa_llm.wire: what front-end and workers say to each other, and how it is encoded."""
