// Light or dark as chosen earlier, before anything is drawn. settings.js changes the choice.
try {
  const theme = localStorage.getItem("mixtral-mlx/theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // A browser that keeps nothing follows the system.
}
