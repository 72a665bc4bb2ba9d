// Shows the OpenAPI document with Swagger UI, in the colors that the reader prefers. URLs are relative to the page, which a
// proxy may publish under a prefix.

const dark = matchMedia("(prefers-color-scheme: dark)");
const applyColors = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
applyColors();
dark.addEventListener("change", applyColors);

SwaggerUIBundle({
  url: new URL("./openapi.json", location).pathname,
  dom_id: "#swagger-ui",
  deepLinking: true,
  presets: [SwaggerUIBundle.presets.apis],
  validatorUrl: null, // the public validator would be asked about this service
});
