"""Why a trained model separates: numbers, figures, words, and the page that holds them."""
