"""Operations on a trained model: load it, find its data, change its threshold."""
